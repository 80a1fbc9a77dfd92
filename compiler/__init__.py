"""The compiler: checkpoint in, verified bundle out. Start reading at build.py."""
