"""The kinds of tokenizers that checkpoints bring along, one file each, behind one protocol: base.Vocabulary."""
