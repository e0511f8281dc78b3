// Renders what pymdownx.arithmatex marked as mathematics, on every page load
// (Material swaps pages without reloading; document$ tells when).
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const tex = element.textContent.trim();
    const displayMode = tex.startsWith("\\[");
    katex.render(tex.slice(2, -2), element, { displayMode, throwOnError: false });
  }
});
