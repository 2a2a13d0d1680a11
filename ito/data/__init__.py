"""Pictures with captions, from any format: found out, read, split, augmented; the emoji sets."""
