"""The parts of scripts/train_demo_model.py: the text it makes, the vocabulary, the network, the file."""
