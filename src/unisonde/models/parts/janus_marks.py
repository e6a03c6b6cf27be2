"""What Janus-Pro and JanusFlow have in common: the special tokens of their tokenizer, and the system prompt of understanding."""

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_IMAGE, END_IMAGE, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""The published system prompt of understanding and text. Drawing has none, and the twins have none at all."""
