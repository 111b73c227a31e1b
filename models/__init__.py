"""What differs between architectures, the shared error tree, and the embedded tiny model."""
