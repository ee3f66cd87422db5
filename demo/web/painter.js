// Paints a mask over a photo. From the server: value = {photo, mask}, data URIs or null. To the server: value = {painted}, a PNG of
// the photo's size, opaque where the object is; null: not touched, the server knows the mask.
const [image, canvas, brush] = ["img", "canvas", "input"].map((name) => element.querySelector(name));
const [paint, erase, undo, clear] = element.querySelectorAll("button");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const COLOUR = "rgb(230, 159, 0)";
let erasing = false;
let last = null; // where the pen is, while it is down
let before = []; // what was painted before each stroke, for undo

function load() {
	const { photo, mask } = props.value ?? {};
	if (photo === undefined) return; // what we said ourselves
	before = [];
	choose(false);
	if (!photo) return image.removeAttribute("src");
	image.onload = () => {
		canvas.width = image.naturalWidth;
		canvas.height = image.naturalHeight;
		canvas.parentElement.style.width = `min(100%, ${(340 * canvas.width) / canvas.height}px)`; // at most 340 pixels high
		if (!mask) return;
		const drawn = new Image();
		drawn.onload = () => pen.drawImage(drawn, 0, 0);
		drawn.src = mask;
	};
	image.src = photo;
}

function at(event) {
	const box = canvas.getBoundingClientRect();
	return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

function stroke(event) {
	const here = at(event);
	pen.globalCompositeOperation = erasing ? "destination-out" : "source-over";
	pen.strokeStyle = COLOUR;
	pen.lineCap = "round";
	pen.lineWidth = (Math.max(canvas.width, canvas.height) * brush.value) / 100;
	pen.beginPath();
	pen.moveTo(...last);
	pen.lineTo(...here);
	pen.stroke();
	last = here;
}

function remember() {
	before = [...before.slice(-19), pen.getImageData(0, 0, canvas.width, canvas.height)];
}

function tell() {
	props.value = { painted: canvas.toDataURL("image/png") };
}

function choose(rubber) {
	erasing = rubber;
	paint.setAttribute("aria-pressed", !rubber);
	erase.setAttribute("aria-pressed", rubber);
}

canvas.addEventListener("pointerdown", (event) => {
	if (event.button !== 0 || !image.getAttribute("src")) return;
	event.preventDefault();
	canvas.setPointerCapture(event.pointerId);
	remember();
	last = at(event);
	stroke(event);
});
canvas.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => {
	if (last) tell();
	last = null;
});
paint.addEventListener("click", () => choose(false));
erase.addEventListener("click", () => choose(true));
undo.addEventListener("click", () => {
	if (!before.length) return;
	pen.putImageData(before.pop(), 0, 0);
	tell();
});
clear.addEventListener("click", () => {
	remember();
	pen.clearRect(0, 0, canvas.width, canvas.height);
	tell();
});
watch("value", load);
load();
