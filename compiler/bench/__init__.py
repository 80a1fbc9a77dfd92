"""`smc bench`: how fast a bundle is, and how fast its peers are. Start reading at run.py; docs/benchmarks.md says what is measured how."""
