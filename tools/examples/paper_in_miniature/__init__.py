"""The paper's comparison in miniature: a language with a credit for every token, and all methods on it."""
