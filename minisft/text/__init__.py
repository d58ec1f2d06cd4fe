"""From messages to token ids: tokenizer, chat templates, loss masks."""
