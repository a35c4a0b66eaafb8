"""mergekit's YAML: read, checked and resolved to tasks for every tensor."""
