"""Other people's programs, unmodified, plain and compressed: PyG's own tests and examples, packages from the index."""
