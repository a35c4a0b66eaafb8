"""Reading and writing model folders. Imports torch for pickled checkpoints only."""
