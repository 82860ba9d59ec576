"""`bigvivit calibrate`: what this machine's GPU, or its CPU, says of every forecast.

A list of rows (`rows.py`), the most valuable first, measured in a child process (`supervisor.py`), with what a virtual
GPU and a trace say of the same beside them, and kept as they come (`journal.py`); then a report (`page.py`) and the
constants that `plan` takes for this card (`calibration.py`).
"""
