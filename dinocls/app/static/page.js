'use strict'
const $ = id => document.getElementById(id)
const words = name => name.replaceAll('_', ' ')
let picture = null, asking = null, limit = Infinity

function made(tag, text = '', more = {}) {
  const element = Object.assign(document.createElement(tag), more)
  element.textContent = text
  return element
}

function tell(problem) {
  $('problem').textContent = problem
  $('problem').hidden = !problem
  if (!problem) return
  $('prediction').textContent = 'There is none.'
  $('best').replaceChildren()
  $('unsure').hidden = $('shown').hidden = true
}

function show(found) {
  tell('')
  $('prediction').textContent = found.prediction
  $('unsure').hidden = !found.uncertain
  $('best').replaceChildren(...found.top5.map(([name, p]) => {
    const row = made('li')
    row.append(made('span', name), made('span', `${(100 * p).toFixed(1)} %`),
               made('meter', '', {value: p, ariaLabel: name}))
    return row
  }))
  $('seen').src = $('under').src = found.picture
  if (found.attention) $('over').src = found.attention
  $('looked').hidden = !found.attention
  $('shown').hidden = false
}

async function ask() {
  $('level').textContent = $('severity').value
  if (!picture) return
  if (asking) asking.abort()  // the last one counts
  const mine = asking = new AbortController()
  try {
    if (picture.size > limit) return tell(`The file has more than ${limit.toLocaleString('en')} bytes: choose a smaller one.`)
    const reply = await fetch(`look?worse=${$('worse').value}&severity=${$('severity').value}`, {
      method: 'POST', body: picture, signal: mine.signal, headers: {'Content-Type': 'application/octet-stream'}})
    const found = await reply.json()
    if (mine === asking) reply.ok ? show(found) : tell(found.detail)
  } catch (error) {
    if (mine === asking && error.name !== 'AbortError') tell('The service did not answer: try again later.')
  }
}

function take(file) {
  if (!file) return
  picture = file
  URL.revokeObjectURL($('given').src)
  $('given').src = URL.createObjectURL(file)
  $('given').hidden = false
  ask()
}

$('given').onerror = () => { $('given').hidden = true }
$('file').onchange = () => take($('file').files[0])
document.onpaste = event => take(event.clipboardData.files[0])
document.ondragover = event => { event.preventDefault(); $('drop').classList.add('over') }
document.ondragleave = () => $('drop').classList.remove('over')
document.ondrop = event => {
  event.preventDefault()
  $('drop').classList.remove('over')
  take(event.dataTransfer.files[0])
}
$('worse').onchange = $('severity').onchange = ask
$('severity').oninput = () => { $('level').textContent = $('severity').value }

fetch('page.json').then(reply => reply.json()).then(about => {
  limit = about.max_bytes
  const some = about.classes.slice(0, 12).join(', ') + (about.classes.length > 12 ? ', …' : '')
  $('about').textContent = `A vision transformer (${about.backbone}) says which of ${about.classes.length} classes a ` +
    `picture shows: ${some}. It knows nothing else: a picture of something else gets one of these classes all the same.`
  $('worse').append(...about.corruptions.map(name => made('option', words(name), {value: name})))
  $('worse').value = 'gaussian_noise'
  $('examples').append(...about.examples.map((url, i) => {
    const button = made('button', '', {type: 'button', onclick: async () => take(await (await fetch(url)).blob())})
    button.append(made('img', '', {src: url, alt: `Example ${i + 1}`}))
    return button
  }))
})
