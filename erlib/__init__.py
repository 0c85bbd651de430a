"""Helpers behind the numbered notebooks: from noisy web documents to a small local extraction model."""
