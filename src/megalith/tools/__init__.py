"""Whole walks and reports over the packages below: the quickstart, the doctor."""
