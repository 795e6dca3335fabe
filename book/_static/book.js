// The theme's sidebar opens its parts with a sign that has no name: give it one for screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const sign of document.querySelectorAll("nav summary:not([aria-label])")) {
    const link = sign.closest("li")?.querySelector("a");
    sign.setAttribute("aria-label", `Pages under ${link?.textContent.trim() ?? "this entry"}`);
  }
});
