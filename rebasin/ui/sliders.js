// While a slider is drawn its column follows; when it is let go, the page is told. The focus outlives the drawing anew.
let focused = null;
element.addEventListener('input', (event) => {
  if (!event.target.dataset || event.target.dataset.block === undefined) return;
  event.stopPropagation();
  const label = event.target.closest('label');
  label.style.setProperty('--value', event.target.value);
  label.querySelector('output').textContent = Number(event.target.value).toFixed(2).replace(/^0\./, '.');
});
element.addEventListener('change', (event) => {
  if (!event.target.dataset || event.target.dataset.block === undefined) return;
  event.stopPropagation();
  focused = event.target.dataset.block;
  const values = [...props.value.values];  // the others as they are: a preset has finer steps than sliders
  values[Number(focused)] = Number(event.target.value);
  props.value = { ...props.value, values };
  trigger('input');
});
element.addEventListener('focusin', (event) => { focused = event.target.dataset ? event.target.dataset.block : null; });
new MutationObserver(() => {
  if (focused === null || focused === undefined || element.contains(document.activeElement)) return;
  if (document.activeElement && document.activeElement !== document.body) return;
  const slider = element.querySelector(`input[data-block="${focused}"]`);
  if (slider) slider.focus({ preventScroll: true });
}).observe(element, { childList: true, subtree: true });
