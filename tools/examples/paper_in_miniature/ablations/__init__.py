"""When does TGDPO win? The questions of docs/reproduction.md, on the miniature's language."""
