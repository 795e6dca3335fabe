// The theme's sidebar opens its parts with a sign that has no name: give it one for screen readers.
document.addEventListener("DOMContentLoaded", () => {
  for (const sign of document.querySelectorAll("nav summary:not([aria-label])")) {
    const link = sign.closest("li")?.querySelector("a");
    sign.setAttribute("aria-label", `Pages under ${link?.textContent.trim() ?? "this entry"}`);
  }
});

// The page of errata: buttons that show those of one source. Without this script all are shown and there are no buttons.
document.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector(".errata-filter");
  const cards = [...document.querySelectorAll(".erratum")];
  if (!bar || !cards.length) return;
  const sources = { "": "All", note: "Notes", paper: "Papers", code: "Public code" };
  const of = (source) => (source ? cards.filter((card) => card.classList.contains(`erratum-${source}`)) : cards);
  const count = document.createElement("span");
  const buttons = [];

  const show = (source) => {
    const shown = new Set(of(source));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.value === source));
    for (const card of cards) card.classList.toggle("filtered-out", !shown.has(card));
    for (const section of new Set(cards.map((card) => card.closest("section")))) {
      const empty = ![...section.querySelectorAll(".erratum")].some((card) => shown.has(card));
      section.classList.toggle("filtered-out", empty);
      // The list of sections beside the page names only those that are there.
      for (const link of document.querySelectorAll(`.page-toc a[href="#${section.id}"]`)) {
        link.closest("li")?.classList.toggle("filtered-out", empty);
      }
    }
    count.textContent = `${shown.size} of ${cards.length} shown`;
  };

  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Show errata of");
  for (const [source, label] of Object.entries(sources)) {
    if (!of(source).length) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.value = source;
    button.textContent = label;
    button.addEventListener("click", () => show(source));
    buttons.push(button);
  }
  count.setAttribute("role", "status");
  bar.replaceChildren(...buttons, count);

  // A link to a card that is filtered away shows all of them again.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target?.closest(".filtered-out")) return;
    show("");
    target.scrollIntoView();
  };
  show("");
  addEventListener("hashchange", reveal);
});
