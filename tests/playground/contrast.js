// The least contrast between a text and what is behind it (WCAG 2), and where that is: [ratio, element].
() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const blend = (color, behind) => {
    for (const fill of [behind, color]) {
      canvas.fillStyle = fill;
      canvas.fillRect(0, 0, 1, 1);
    }
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(" ")})`;
  };
  const background = (node) =>
    node ? blend(getComputedStyle(node).backgroundColor, background(node.parentElement)) : "white";
  const linear = (channel) => (channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [r, g, b] = color.match(/\d+/g).map((channel) => linear(channel / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [21, ""];
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    if (!hasText || node.disabled || !node.checkVisibility() || node.closest(".skip, .unseen")) continue;
    const behind = background(node);
    const pair = [blend(getComputedStyle(node).color, behind), behind].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${node.tagName} ${node.className} ${node.textContent.slice(0, 40)}`];
  }
  return worst;
}
