"""What the token-reward report is made of; ``tgdpo/report.py`` puts it together."""
