// Opens workflows in ComfyUI's real frontend: node check.mjs PORT RENDERER SCREENSHOTS QUEUE FILE...
// RENDERER is classic or nodes2; with QUEUE = queue every workflow is also run from the page. One line of JSON per
// workflow. PLAYWRIGHT and CHROMIUM say where playwright-core and the browser are.
import fs from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const { chromium } = await import(pathToFileURL(path.join(process.env.PLAYWRIGHT, 'index.mjs')))
const [port, renderer, screenshots, queue, ...files] = process.argv.slice(2)
const server = `http://127.0.0.1:${port}`
const settings = {
  'Comfy.TutorialCompleted': true, // else the template dialog covers everything
  'Comfy.Validation.Workflows': true,
  'Comfy.VueNodes.Enabled': renderer === 'nodes2'
}
for (const [key, value] of Object.entries(settings)) {
  const body = JSON.stringify(value)
  await fetch(`${server}/api/settings/${key}`, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body })
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
})
try {
  const context = await browser.newContext({ viewport: { width: 1600, height: 900 } })
  const page = await context.newPage()
  let errors = []
  page.on('pageerror', (error) => errors.push(String(error)))
  await page.goto(server, { waitUntil: 'domcontentloaded', timeout: 300000 })
  await page.waitForFunction(
    () => window.app?.isGraphReady && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100,
    null,
    { timeout: 600000, polling: 500 }
  )
  await page.waitForTimeout(1500)
  for (const file of files) {
    const name = path.basename(file, '.json')
    errors = []
    const report = await page.evaluate(open, JSON.parse(fs.readFileSync(file, 'utf8')))
    const end = queue === 'queue' ? await page.evaluate(run) : null
    await page.evaluate(() => app.extensionManager.command.execute('Comfy.Canvas.FitView'))
    await page.waitForTimeout(1500)
    await page.screenshot({ path: path.join(screenshots, `${name}.${renderer}.png`), timeout: 120000 })
    console.log(JSON.stringify({ name, ...report, end, errors }))
  }
} finally {
  await browser.close()
}

// In the page: load the workflow; what is missing, what comes back, and the prompt the frontend would send.
async function open(workflow) {
  await app.loadGraphData(workflow, true, true, 'check')
  const all = []
  const walk = (graph) => graph.nodes.forEach((node) => (node.subgraph ? walk(node.subgraph) : all.push(node)))
  walk(app.rootGraph ?? app.graph)
  return {
    missing: all.filter((node) => !(node.type in LiteGraph.registered_node_types)).map((node) => node.type),
    faulty: all.filter((node) => node.has_errors).map((node) => node.type),
    back: app.graph.serialize(),
    prompt: (await app.graphToPrompt()).output
  }
}

// In the page: queue the graph as the Run button does; how it ended, and which nodes showed pictures.
async function run() {
  const shown = []
  const end = await new Promise((resolve) => {
    app.api.addEventListener('executed', (event) => {
      if (event.detail.output?.images?.length) shown.push(String(event.detail.display_node ?? event.detail.node))
    })
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
      app.api.addEventListener(kind, (event) => resolve([kind, event.detail.exception_message ?? '', event.detail.prompt_id]), { once: true })
    setTimeout(() => resolve(['timeout', 'after 5 minutes']), 300000)
    app.queuePrompt(0, 1)
  })
  const drawn = () =>
    (app.rootGraph ?? app.graph).nodes.filter((node) => node.imgs?.some((img) => img.naturalWidth > 0))
  for (let i = 0; i < 40 && drawn().length < new Set(shown).size; i++)
    await new Promise((resolve) => setTimeout(resolve, 250)) // the pictures load
  return { kind: end[0], message: end[1], id: end[2], shown, drawn: drawn().map((node) => String(node.id)) }
}
