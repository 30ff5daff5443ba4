"""Prints lines, of which another process may print as many to the same file at the same time."""

import sys

if __name__ == "__main__":
    for _ in range(2000):
        for stream in (sys.stdout, sys.stderr):
            print("a line", file=stream)
