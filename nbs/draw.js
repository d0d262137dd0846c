'use strict'
// Read the digit that is drawn on the page. `block3`, the network, comes from block3.js, which `block3_export` writes.
// An image is {channels, height, width, data}: data is a Float32Array, channel by channel, row by row.

const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer)
for (const layer of block3.layers)
  for (const key of ['weight', 'scale', 'shift']) if (layer[key]) layer[key].data = floats(layer[key].data)
for (const array of Object.values(block3.known)) array.data = floats(array.data)

function convolve(image, layer) {
  const [channels, , size] = layer.weight.shape, pad = layer.padding, weight = layer.weight.data
  const height = image.height + 2*pad - size + 1, width = image.width + 2*pad - size + 1
  const data = new Float32Array(channels*height*width)
  let at = 0
  for (let c = 0; c < channels; c++)
    for (let from = 0; from < image.channels; from++)
      for (let dy = -pad; dy < size - pad; dy++)
        for (let dx = -pad; dx < size - pad; dx++) {
          const w = weight[at++]
          for (let y = Math.max(0, -dy); y < Math.min(height, image.height - dy); y++)
            for (let x = Math.max(0, -dx); x < Math.min(width, image.width - dx); x++)
              data[(c*height + y)*width + x] += w*image.data[(from*image.height + y + dy)*image.width + x + dx]
        }
  return {channels, height, width, data}
}

// ReLU and BatchNorm, in place
function activate(image, layer) {
  const area = image.height*image.width
  for (let i = 0; i < image.data.length; i++) {
    if (layer.relu) image.data[i] = Math.max(0, image.data[i])
    if (layer.scale) image.data[i] = image.data[i]*layer.scale.data[Math.floor(i/area)] + layer.shift.data[Math.floor(i/area)]
  }
  return image
}

function pool(image, size, start, add) {
  const height = Math.floor(image.height/size), width = Math.floor(image.width/size)
  const data = new Float32Array(image.channels*height*width).fill(start)
  for (let c = 0; c < image.channels; c++)
    for (let y = 0; y < height*size; y++)
      for (let x = 0; x < width*size; x++) {
        const to = (c*height + Math.floor(y/size))*width + Math.floor(x/size)
        data[to] = add(data[to], image.data[(c*image.height + y)*image.width + x])
      }
  return {channels: image.channels, height, width, data}
}

// Mean and standard deviation of each channel
function channelStats({channels, data}) {
  const area = data.length/channels, mean = values => values.reduce((a, b) => a + b)/area
  const rows = Array.from({length: channels}, (_, c) => Array.from(data.subarray(c*area, (c + 1)*area)))
  const means = rows.map(mean)
  return [...means, ...rows.map((row, c) => Math.sqrt(mean(row.map(v => (v - means[c])**2))))]
}

function run(image, layer) {
  image = activate(convolve(image, layer), layer)
  const stats = channelStats(image)
  if (layer.max_pool) image = pool(image, layer.max_pool, -Infinity, Math.max)
  if (layer.avg_pool) image = pool(image, layer.avg_pool, 0, (sum, v) => sum + v/layer.avg_pool**2)
  return {...image, stats}
}

// 1 for an image like the digits that the network has learnt, towards 0 for others
function familiarity(stats, {whiten, means, limit}) {
  const n = stats.length, at = stats.map((_, j) => stats.reduce((sum, v, i) => sum + v*whiten.data[i*n + j], 0))
  const distances = Array.from({length: 10}, (_, k) => Math.hypot(...at.map((v, j) => v - means.data[k*n + j])))
  return Math.min(1, limit.data[0]/Math.min(...distances))**2
}

// Ten probabilities, as from `predict_digits` with `careful=True`, for 28×28 grey values from 0 to 255
function predict(grey) {
  const data = Float32Array.from(grey, v => (v/255 - block3.mean)/block3.std)
  const outs = [], step = (image, layer) => { outs.push(run(image, layer)); return outs.at(-1) }
  const scores = block3.layers.reduce(step, {channels: 1, height: 28, width: 28, data}).data
  const top = Math.max(...scores), powers = Array.from(scores, v => Math.exp(v - top))
  const sum = powers.reduce((a, b) => a + b)
  const share = block3.known.limit ? familiarity(outs.slice(-6, -1).flatMap(out => out.stats), block3.known) : 1
  return powers.map(v => share*v/sum + (1 - share)/10)
}

// What follows is the library's `mnist_form` for light strokes on black: the tests compare the two
// A box is [top, bottom, left, right]

// The connected parts of a mask: their pixels and boxes, the largest first
function partsOf(mask, height, width) {
  const left = Array.from(mask), parts = []
  left.forEach((_, start) => {
    if (!left[start]) return
    left[start] = false
    const pixels = [start]
    for (const i of pixels) // grows on the way
      for (let y = Math.max(0, Math.floor(i/width) - 1); y <= Math.min(height - 1, Math.floor(i/width) + 1); y++)
        for (let x = Math.max(0, i % width - 1); x <= Math.min(width - 1, i % width + 1); x++)
          if (left[y*width + x]) { left[y*width + x] = false; pixels.push(y*width + x) }
    const box = pixels.map(i => [Math.floor(i/width), Math.floor(i/width) + 1, i % width, i % width + 1]).reduce(union)
    parts.push({pixels, box})
  })
  return parts.sort((a, b) => size(b.box) - size(a.box))
}

const union = (a, b) => a.map((v, i) => i % 2 ? Math.max(v, b[i]) : Math.min(v, b[i]))
const size = ([top, bottom, left, right]) => Math.max(bottom - top, right - left)
const gaps = (a, b) => [0, 2].map(i => Math.max(a[i], b[i]) - Math.min(a[i + 1], b[i + 1]))

// Whether a part is no spot, and no line along the border
function isStroke({pixels, box: [top, bottom, left, right]}, height, width) {
  const [h, w] = [bottom - top, right - left]
  if (bottom <= height >> 4 || top >= height - (height >> 4) || right <= width >> 4 || left >= width - (width >> 4)) return false
  return Math.max(h/height, w/width) > 0.15 || pixels.length < 0.65*h*w || Math.max(h, w) > 1.5*Math.min(h, w)
}

// Two boxes side by side, of about the same height
function areBeside(a, b) {
  const height = Math.max(a[1] - a[0], b[1] - b[0]), [down, across] = gaps(a, b)
  return down < -0.7*height && across > -0.1*height
}

// The box of the digit and the ink without other parts, or 'none' or 'several'
function findDigit(ink, mask, height, width) {
  const [first, ...others] = partsOf(mask, height, width).filter(part => isStroke(part, height, width))
  if (!first) return 'none'
  let box = first.box
  const own = Float32Array.from(ink, (v, i) => mask[i] ? 0 : v), keep = part => part.pixels.forEach(i => { own[i] = ink[i] })
  keep(first)
  for (const part of others) {
    if (Math.max(...gaps(box, part.box)) <= 0.2*size(box) && !areBeside(first.box, part.box)) {
      keep(part)
      box = union(box, part.box)
    } else if (size(part.box) > 0.6*size(box)) return 'several'
  }
  return {box, own}
}

// Means over squares of 7×7 pixels, or less in small pictures
function soften(ink, height, width) {
  const n = Math.min(3, Math.floor(Math.max(height, width)/28))
  const along = (from, step, place, length) => from.map((_, i) => {
    const at = place(i), last = length - 1
    let sum = 0
    for (let k = at - n; k <= at + n; k++) sum += from[i + (last - Math.abs(last - Math.abs(k)) - at)*step] // mirrored at the edge
    return sum/(2*n + 1)
  })
  return along(along(ink, width, i => Math.floor(i/width), height), 1, i => i % width, width)
}

// centre of mass, down and across
function centre(ink, height, width) {
  let [sum, down, across] = [0, 0, 0]
  ink.forEach((v, i) => { sum += v; down += v*Math.floor(i/width); across += v*(i % width) })
  return [down/sum, across/sum]
}

// For each of `to` pixels made of `length`, beginning at `start`: the pixels it is made of and their weights, by Pillow's bicubic filter
function taps(total, start, length, to) {
  const scale = length/to, stretch = Math.max(1, scale), reach = 2*stretch
  const cubic = x => (x = Math.abs(x)) < 1 ? (1.5*x - 2.5)*x*x + 1 : x < 2 ? ((-0.5*x + 2.5)*x - 4)*x + 2 : 0
  return Array.from({length: to}, (_, i) => {
    const middle = start + (i + 0.5)*scale
    const from = Math.max(0, Math.floor(middle - reach + 0.5)), end = Math.min(total, Math.floor(middle + reach + 0.5))
    const weights = Array.from({length: end - from}, (_, k) => cubic((from + k - middle + 0.5)/stretch))
    const sum = weights.reduce((a, b) => a + b)
    return {from, weights: weights.map(v => v/sum)}
  })
}

function resize(ink, height, width, [top, bottom, left, right], h, w) {
  const wide = new Float32Array(height*w), out = new Float32Array(h*w)
  taps(width, left, right - left, w).forEach(({from, weights}, x) => {
    for (let y = 0; y < height; y++) wide[y*w + x] = weights.reduce((sum, v, k) => sum + v*ink[y*width + from + k], 0)
  })
  taps(height, top, bottom - top, h).forEach(({from, weights}, y) => {
    for (let x = 0; x < w; x++) out[y*w + x] = weights.reduce((sum, v, k) => sum + v*wide[(from + k)*w + x], 0)
  })
  return out.map(v => Math.max(0, v))
}

// Means over squares of n×n pixels
function reduced({ink, height, width}, n) {
  const small = {height: Math.ceil(height/n), width: Math.ceil(width/n)}
  const sums = new Float32Array(small.height*small.width), counts = new Float32Array(sums.length)
  ink.forEach((v, i) => {
    const at = Math.floor(Math.floor(i/width)/n)*small.width + Math.floor(i % width/n)
    sums[at] += v
    counts[at]++
  })
  return {...small, ink: sums.map((sum, i) => Math.round(sum/counts[i]))}
}

// The digit in an image and that image, or 'none' or 'several'
function findInk({ink, height, width}) {
  const max = values => values.reduce((a, b) => Math.max(a, b), 0)
  const soft = soften(ink, height, width), least = 0.15*max(soft)
  const inside = Array.from(ink, (v, i) => soft[i] > least ? v : 0), most = max(inside)
  const found = findDigit(ink, inside.map(v => v > most/5), height, width)
  return found.box ? {...found, height, width} : found
}

// 28×28 grey values in MNIST's form, or 'none' or 'several'
function mnistForm(ink, height, width) {
  const image = {ink: Float32Array.from(ink), height, width}, n = Math.floor(Math.max(height, width)/80)
  let found = n > 1 ? findInk(reduced(image, n)) : 'none'
  if (found === 'none' || found.box && size(found.box) < 22) found = findInk(image) // small digits are read from all pixels
  if (!found.box) return found
  const [top, bottom, left, right] = found.box
  const [h, w] = [bottom - top, right - left].map(v => Math.max(1, Math.floor(20*v/size(found.box) + 0.5)))
  const small = resize(found.own, found.height, found.width, found.box, h, w), darkest = Math.max(...small), middle = centre(small, h, w)
  const [y0, x0] = [h, w].map((n, i) => Math.min(Math.max(Math.floor(14.5 - middle[i]), 0), 28 - n))
  const out = new Array(28*28).fill(0)
  small.forEach((v, i) => { out[(y0 + Math.floor(i/w))*28 + x0 + i % w] = Math.min(255, Math.floor(v*255/darkest + 0.5)) })
  return out
}

function page(root) {
  const find = name => root.querySelector('.' + name)
  const canvas = find('draw-canvas'), seen = find('draw-seen'), said = find('draw-said')
  const pen = canvas.getContext('2d', {willReadFrequently: true}), small = seen.getContext('2d')
  const bars = [...root.querySelectorAll('meter')], percents = [...root.querySelectorAll('.draw-percent')]
  let last = null, waiting = false

  function clear() {
    pen.fillStyle = 'black'
    pen.fillRect(0, 0, canvas.width, canvas.height)
    Object.assign(pen, {strokeStyle: 'white', lineWidth: canvas.width/12, lineCap: 'round', lineJoin: 'round'})
    look()
  }

  function look() {
    waiting = false
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data
    const found = mnistForm(pixels.filter((_, i) => i % 4 === 0), canvas.height, canvas.width)
    const form = Array.isArray(found) ? found : null
    const probs = form ? predict(form) : new Array(10).fill(0), digit = probs.indexOf(Math.max(...probs))
    const image = small.createImageData(28, 28)
    image.data.forEach((_, i) => { image.data[i] = i % 4 === 3 ? 255 : form ? form[i >> 2] : 0 })
    small.putImageData(image, 0, 0)
    bars.forEach((bar, i) => { bar.value = probs[i]; bar.classList.toggle('draw-top', !!form && i === digit) })
    percents.forEach((o, i) => { o.textContent = form ? `${(100*probs[i]).toFixed(1)} %` : '' })
    const answer = `${probs[digit] < 0.95 ? 'I am not sure. It may be' : 'This is'} a ${digit} (${(100*probs[digit]).toFixed(1)} %).`
    said.textContent = form ? answer : found === 'several' ? 'These are several digits. Draw one.' : 'Draw a digit.'
    Object.assign(root, {form, probs})
    if (form && !performance.getEntriesByName('first-digit').length) performance.mark('first-digit')
  }

  function line(from, to) {
    pen.beginPath()
    pen.moveTo(...from)
    pen.lineTo(...to)
    pen.stroke()
    if (!waiting) { waiting = true; requestAnimationFrame(look) }
  }

  const place = event => {
    const frame = canvas.getBoundingClientRect()
    return [(event.clientX - frame.left)*canvas.width/frame.width, (event.clientY - frame.top)*canvas.height/frame.height]
  }
  canvas.addEventListener('pointerdown', event => {
    if (event.button) return
    canvas.setPointerCapture(event.pointerId)
    last = place(event)
    line(last, last)
    event.preventDefault()
  })
  canvas.addEventListener('pointermove', event => {
    if (!last) return
    for (const o of event.getCoalescedEvents?.() || []) { const to = place(o); line(last, to); last = to }
    const to = place(event)
    line(last, to)
    last = to
  })
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { last = null })
  find('draw-clear').addEventListener('click', clear)

  clear()
  const three = [[90, 70], [120, 50], [165, 55], [180, 85], [160, 120], [125, 135], [170, 148], [190, 185], [165, 220], [120, 228], [85, 210]]
  three.slice(1).forEach((to, i) => line(three[i], to))
}

document.querySelectorAll('.draw').forEach(page)
