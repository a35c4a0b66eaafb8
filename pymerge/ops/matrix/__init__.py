"""The op `matrix`: task vectors of linear layers as matrices (docs/spec/matrix.md)."""
