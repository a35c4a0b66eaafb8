"""Reading and writing model folders; torch is imported for pickled checkpoints only."""
