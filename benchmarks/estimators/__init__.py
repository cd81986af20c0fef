"""The estimators on equal terms: the same trunk, start, data, steps and batch for every one."""
