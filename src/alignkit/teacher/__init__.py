"""The teacher: whoever expands, answers and grades. An OpenAI-compatible server, or the embedded scripted one."""
