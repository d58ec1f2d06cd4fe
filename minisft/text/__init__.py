"""Convert chats and text to token ids: tokenizer, chat templates, loss masks."""
