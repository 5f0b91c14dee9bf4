// Before the first paint, so that nothing flashes: the theme that was chosen, else the system's.
try {
  const chosen = localStorage.getItem("chorus-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is closed to this page: the system's theme it is.
  document.documentElement.removeAttribute("data-theme");
}
