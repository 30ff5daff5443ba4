"""Judging files of answers with a model or a server: what ``tgdpo judge`` does."""
