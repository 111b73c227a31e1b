"""Models of the Hugging Face hub: names, the shared cache, downloads that go on where they stopped."""
