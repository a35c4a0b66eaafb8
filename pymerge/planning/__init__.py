"""From a recipe and its models' headers to a plan; no tensor data is read."""
