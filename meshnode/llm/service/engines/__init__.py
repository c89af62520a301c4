"""The engines that compute no layers themselves: servers elsewhere that speak OpenAI's protocol, llama.cpp's RPC."""
