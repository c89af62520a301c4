"""Who is alive: SWIM with Lifeguard, and deaths that need witnesses."""
