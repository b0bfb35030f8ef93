"""The built-in English-German corpus: a seeded grammar, its lexicon and sentences."""
