"""What the token-reward report is made of; ``tools/token_report.py`` puts it together."""
