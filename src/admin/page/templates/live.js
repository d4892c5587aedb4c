// Keeps the parts of a page that are marked with data-live fresh. Nothing else needs a script.
"use strict";
const parts = [...document.querySelectorAll("[data-live]")];
async function refresh(part) {
  const answer = await fetch(part.dataset.live, { headers: { accept: "text/html" } });
  // A redirect to the login means that the session ended; what is shown stays, with the time it is from.
  if (!answer.ok || answer.redirected) return;
  const text = await answer.text();
  if (part.dataset.last === text) return;
  part.dataset.last = text;
  const fresh = new DOMParser().parseFromString(text, "text/html");
  part.replaceChildren(...fresh.body.childNodes);
}
async function turn() {
  if (!document.hidden) await Promise.allSettled(parts.map(refresh));
  setTimeout(turn, 2000);
}
if (parts.length > 0) setTimeout(turn, 2000);
