"""`smc eval`: how good matches are, against ground truth. Start reading at run.py; docs/evaluation.md says what is measured how."""
