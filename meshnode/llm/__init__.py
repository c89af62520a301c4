"""Large language models on one machine or split over several: files, engines, sessions, chats."""
