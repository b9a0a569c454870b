"""Model families: from a checkpoint's own description to `ModelConfig` and canonical tensor names."""
