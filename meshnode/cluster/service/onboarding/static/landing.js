// Makes the join command out of the address bar. The part behind '#' stays in this page: nothing here sends anything.
"use strict";

const FRAGMENT = /^#[A-Za-z0-9_-]{24}\.[A-Za-z0-9_-]{44}(\.[A-Za-z0-9_-]{1,400})?$/;

/** The operating system whose steps to show first. */
function guessOs() {
  const platform = (navigator.userAgentData && navigator.userAgentData.platform) || navigator.platform || navigator.userAgent;
  if (/mac|iphone|ipad/i.test(platform)) return "macos";
  if (/win/i.test(platform)) return "windows";
  return "linux";
}

function showOs(os) {
  for (const button of document.querySelectorAll(".tabs button")) {
    button.setAttribute("aria-pressed", String(button.dataset.os === os));
  }
  for (const steps of document.querySelectorAll(".os")) {
    steps.hidden = steps.dataset.os !== os;
  }
}

function showCommand() {
  const whole = FRAGMENT.test(location.hash);
  document.getElementById("with-secret").hidden = !whole;
  document.getElementById("without-secret").hidden = whole;
  // Single quotes keep every shell from reading '#', '[' or '?' as its own; none can occur inside.
  const address = location.origin + location.pathname + location.hash;
  document.getElementById("join-command").textContent = whole ? "meshnode up --join '" + address + "'" : "";
}

/** The clipboard API needs a secure context, which a page over plain HTTP is not; the selection works everywhere. */
function copy(element) {
  const range = document.createRange();
  range.selectNodeContents(element);
  const selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
  const done = document.execCommand("copy");
  if (done) selection.removeAllRanges();
  return done;
}

let timer = 0;

function tell(text) {
  const line = document.getElementById("copied");
  line.textContent = text;
  clearTimeout(timer);
  timer = setTimeout(() => { line.textContent = ""; }, 2500);
}

for (const button of document.querySelectorAll(".tabs button")) {
  button.addEventListener("click", () => showOs(button.dataset.os));
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", () => {
    const done = copy(document.getElementById(button.dataset.copy));
    tell(done ? "Copied" : "Selected: press Ctrl+C or Cmd+C");
  });
}
addEventListener("hashchange", showCommand);
showOs(guessOs());
showCommand();
