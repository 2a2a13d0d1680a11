"""The dual encoder: towers and tokenizer, pretrained parts, fusion, and what it is exported as."""
