"""Text to token ids and back. Read tokenizer.py first.

tokenizer.py, then tokenizer_json.py   text to ids and back, and the files of Hugging Face
tokenizer_export.py   our tokenizers as files of Hugging Face
formats.py   compressed files, and what a file holds that is not text in UTF-8
prompt.py    what a user wants to be continued
messages.py  what a conversation is
chat.py      conversations by a chat template, as text and as ids
render.py    the process in which a chat template runs
"""
