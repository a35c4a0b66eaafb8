"""mergekit's YAML: read, checked, resolved to what is to be done for every tensor."""
