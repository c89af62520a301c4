// Turns the one-time code behind the '#' of a login link into a session cookie. The code stays out of the request
// line and the history: it travels in the body of one request, once.
"use strict";

const message = document.getElementById("message");
const code = location.hash.slice(1);
history.replaceState(null, "", location.pathname);

async function logIn() {
  if (!code) {
    message.textContent = "This link has no code. POST /api/session/link makes a new one.";
    return;
  }
  const answer = await fetch("/api/session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ code }),
  });
  if (answer.ok) {
    location.replace("/");
    return;
  }
  const told = await answer.json().catch(() => ({}));
  message.textContent = told.error || "The agent did not accept this link.";
}

logIn().catch(() => {
  message.textContent = "The agent does not answer. Is it still running?";
});
