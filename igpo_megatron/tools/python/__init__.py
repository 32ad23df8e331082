"""Runs the policy's code: tool.py is the tool, runner.py the sandbox that it starts."""
