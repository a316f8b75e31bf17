// js-libp2p as a peer under control: JSON lines, requests on stdin, answers and events on stdout.
//
// node peer.mjs '{"seed": hex, "listen": [multiaddr], ...}' prints {"event": "ready", "key", "addrs"}. A request
// {"id": 1, "do": "dial", ...arguments} is answered by {"id": 1, "result": {...}} or {"id": 1, "error": text}. It ends
// when stdin does. Peers are named by the hex of their ed25519 public keys. The operations, the stream protocols and
// the configuration are described in ../interface.py.

import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'

import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { generateKeyPair, generateKeyPairFromSeed, publicKeyFromRaw } from '@libp2p/crypto/keys'
import { dcutr } from '@libp2p/dcutr'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { peerIdFromPublicKey } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { preSharedKey } from '@libp2p/pnet'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/peers/echo/1'
const SINK = '/peers/sink/1'
const DIGEST = '/peers/digest/1'
const FLOOD = '/peers/flood/1'
const FRAME = '/peers/frame/1'
const RESET = '/peers/reset/1'

const PERIOD = 251 // of the content of streams: a prime, so that parts that swap places are noticed
const LARGEST_CHUNK = 1 << 20
const pattern = Uint8Array.from({ length: LARGEST_CHUNK + PERIOD }, (_, i) => i % PERIOD)
const content = (offset, size) => pattern.subarray(offset % PERIOD, (offset % PERIOD) + size)

const config = JSON.parse(process.argv[2] ?? '{}')
const say = (message) => process.stdout.write(JSON.stringify(message) + '\n')
const hex = (bytes) => Buffer.from(bytes).toString('hex')
const peerId = (key) => peerIdFromPublicKey(publicKeyFromRaw(Buffer.from(key, 'hex')))
const keyOf = (id) => hex(id.publicKey.raw)
const now = () => Number(process.hrtime.bigint()) / 1e6 // ms, the machine's monotonic clock

// -- the node ---------------------------------------------------------------------------------------------------------

function swarmKey (key) {
  return new TextEncoder().encode(`/key/swarm/psk/1.0.0/\n/base16/\n${key}\n`)
}

const seed = config.seed && Buffer.from(config.seed, 'hex')
const privateKey = await (seed ? generateKeyPairFromSeed('Ed25519', seed) : generateKeyPair('Ed25519'))
const node = await createLibp2p({
  privateKey,
  addresses: { listen: config.listen ?? ['/ip4/127.0.0.1/tcp/0'], announce: config.announce ?? [] },
  transports: config.relay_client ? [tcp(), circuitRelayTransport()] : [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionProtector: config.pre_shared_key ? preSharedKey({ psk: swarmKey(config.pre_shared_key) }) : undefined,
  // The defaults drop the sixth inbound connection of a second from one address.
  connectionManager: { inboundConnectionThreshold: 1e6, maxIncomingPendingConnections: 1e4, maxConnections: 1e4 },
  connectionMonitor: { enabled: false },
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify({ agentVersion: 'js-libp2p/interop' }),
    ping: ping(),
    pubsub: gossipsub({
      allowPublishToZeroTopicPeers: true,
      emitSelf: false,
      doPX: false,
      fallbackToFloodsub: false,
      ...config.gossipsub
    }),
    ...(config.relay_server
      ? { relay: circuitRelayServer({ reservations: { maxReservations: 100, applyDefaultLimit: false } }) }
      : {}),
    ...(config.dcutr ? { dcutr: dcutr() } : {})
  }
})

const identified = new Map() // by key
node.addEventListener('peer:identify', ({ detail }) => {
  identified.set(keyOf(detail.peerId), {
    agent: detail.agentVersion ?? '',
    protocol_version: detail.protocolVersion ?? '',
    protocols: detail.protocols,
    addresses: detail.listenAddrs.map(String),
    observed: detail.observedAddr?.toString() ?? ''
  })
})

// -- streams ----------------------------------------------------------------------------------------------------------

// The library rejects when the other side ends the stream at the same moment; the answer tells whether all is well.
async function finish (stream) {
  await stream.close().catch(() => undefined)
}

async function write (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}

// All that comes until the other side has finished; rejects when it resets.
function receive (stream, consume) {
  return new Promise((resolve, reject) => {
    stream.addEventListener('message', ({ data }) => consume(data))
    stream.addEventListener('remoteCloseWrite', resolve)
    stream.addEventListener('close', ({ error }) => { error ? reject(error) : resolve() })
    // What happened before the listeners were there:
    if (stream.status === 'reset' || stream.status === 'aborted') reject(new Error('the stream was reset'))
    else if (stream.remoteWriteStatus === 'closed' && stream.readBufferLength === 0) resolve()
  })
}

function serve (protocol, handler) {
  return node.handle(protocol, (stream) => {
    handler(stream).catch((error) => {
      if (process.env.PEER_DEBUG) console.error(protocol, error)
      stream.abort(error)
    })
  }, { maxInboundStreams: 1e4, maxOutboundStreams: 1e4, runOnLimitedConnection: true })
}

// Calls `each` with every part of the first `size` bytes behind a head of 8 bytes that tells `size`.
async function takeSized (stream, each) {
  let head = Buffer.alloc(0)
  let left = Infinity
  for await (const data of stream) {
    let part = data
    if (head.length < 8) {
      const bytes = data.subarray()
      const missing = Math.min(8 - head.length, bytes.length)
      head = Buffer.concat([head, bytes.subarray(0, missing)])
      if (head.length < 8) continue
      left = Number(head.readBigUInt64BE())
      part = bytes.subarray(missing)
    }
    left -= part.byteLength
    await each(part)
    if (left <= 0) return
  }
  throw new Error('the stream ended early')
}

await serve(ECHO, async (stream) => {
  await takeSized(stream, (part) => write(stream, part))
  await finish(stream)
})

// The one that is measured: no queue and no promise per part, as `takeSized` has.
await serve(SINK, async (stream) => {
  let head = Buffer.alloc(0)
  let size = Infinity
  let count = 0
  await new Promise((resolve, reject) => {
    stream.addEventListener('close', () => reject(new Error('the stream ended early')))
    stream.addEventListener('message', ({ data }) => {
      count += data.byteLength
      if (size === Infinity) {
        head = Buffer.concat([head, data.subarray()])
        if (head.length >= 8) size = 8 + Number(head.readBigUInt64BE())
      }
      if (count >= size) resolve()
    })
  })
  await write(stream, uint64(count - 8))
  await finish(stream)
})

await serve(DIGEST, async (stream) => {
  const hash = createHash('sha256')
  await takeSized(stream, (part) => update(hash, part))
  await write(stream, hash.digest())
  await finish(stream)
})

await serve(FLOOD, async (stream) => {
  let order = Buffer.alloc(0)
  for await (const data of stream) {
    order = Buffer.concat([order, data.subarray()])
    if (order.length >= 12) break
  }
  await sendContent(stream, Number(order.readBigUInt64BE(0)), order.readUInt32BE(8))
  await finish(stream)
})

await serve(FRAME, async (stream) => {
  let frame = Buffer.alloc(0)
  for await (const data of stream) {
    frame = frame.length ? Buffer.concat([frame, data.subarray()]) : Buffer.from(data.subarray())
    if (frame.length >= 4 && frame.length >= 4 + frame.readUInt32BE(0)) break
  }
  await write(stream, frame)
  await finish(stream)
})

await serve(RESET, async (stream) => {
  stream.addEventListener('message', () => stream.abort(new Error('as asked')))
})

function uint64 (value) {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(BigInt(value))
  return bytes
}

function update (hash, data) {
  if (data instanceof Uint8Array) hash.update(data)
  else for (const part of data) hash.update(part)
}

async function sendContent (stream, size, chunk) {
  for (let sent = 0; sent < size;) {
    const part = content(sent, Math.min(chunk, size - sent))
    await write(stream, part)
    sent += part.length
  }
}

// Sends content behind its size and hears the answer. Go's daemon takes a half-close for the end of everything, so
// the one who asks says whether it comes before the answer.
async function converse (key, protocol, { size, chunk, half_close: early = true }, consume) {
  const stream = await open(key, protocol)
  const sending = async () => {
    await write(stream, uint64(size))
    await sendContent(stream, size, chunk)
    if (early) await finish(stream)
  }
  await Promise.all([sending(), receive(stream, consume)])
  await finish(stream)
}

async function answerTo (key, protocol, options) {
  const parts = []
  await converse(key, protocol, options, (data) => parts.push(data.slice()))
  return Buffer.concat(parts)
}

// On the connection that there is: for one over a relay, `dialProtocol` would look for a direct one first.
async function open (key, protocol) {
  const options = { maxOutboundStreams: 1e4, runOnLimitedConnection: true, signal: AbortSignal.timeout(10_000) }
  const [connection] = node.getConnections(peerId(key)).sort((a, b) => (a.limits ? 1 : 0) - (b.limits ? 1 : 0))
  return connection?.newStream(protocol, options) ?? node.dialProtocol(peerId(key), protocol, options)
}

async function pingOver (key) {
  const stream = await open(key, '/ipfs/ping/1.0.0')
  const start = now()
  const echoed = new Promise((resolve, reject) => {
    stream.addEventListener('message', resolve)
    stream.addEventListener('close', () => reject(new Error('the stream ended early')))
  })
  await write(stream, Buffer.from(content(0, 32)))
  await echoed
  const ms = now() - start
  await finish(stream)
  return { ms }
}

async function request (key, payload, early) {
  const stream = await open(key, FRAME)
  const head = Buffer.alloc(4)
  head.writeUInt32BE(payload.length)
  stream.send(Buffer.concat([head, payload]))
  const parts = []
  await Promise.all([early && finish(stream), receive(stream, (data) => parts.push(data.slice()))])
  await finish(stream)
  if (!Buffer.concat(parts).subarray(4).equals(payload)) throw new Error('another frame came back')
}

// -- gossip -----------------------------------------------------------------------------------------------------------

const topics = new Map() // topic -> {count, bytes, latencies_ms, report}
const HEAD = 12 // of what publish_many sends: the machine's monotonic clock in ns (8 bytes), a counter (4 bytes)

node.services.pubsub.addEventListener('message', ({ detail: message }) => {
  const topic = topics.get(message.topic)
  if (topic === undefined) return
  topic.count += 1
  topic.bytes += message.data.length
  if (topic.report) {
    const author = keyOf(message.from)
    say({ event: 'message', topic: message.topic, author, data: Buffer.from(message.data).toString('base64') })
  } else if (message.data.length >= HEAD) {
    const sent = Buffer.from(message.data.buffer, message.data.byteOffset, 8).readBigUInt64BE()
    topic.latencies_ms.push(Number(process.hrtime.bigint() - sent) / 1e6)
  }
})

async function publishMany ({ topic, count, size, rate_per_s: rate }) {
  const data = Buffer.alloc(size)
  const start = now()
  for (let n = 0; n < count; n++) {
    const wait = rate ? start + n * 1000 / rate - now() : 0
    if (wait > 1 || n % 50 === 49) await new Promise((resolve) => setTimeout(resolve, Math.max(wait, 0)))
    data.writeBigUInt64BE(process.hrtime.bigint())
    data.writeUInt32BE(n, 8)
    await node.services.pubsub.publish(topic, Uint8Array.from(data))
  }
  return { seconds: (now() - start) / 1000 }
}

// -- operations -------------------------------------------------------------------------------------------------------

const identity = () => ({ key: hex(privateKey.publicKey.raw), addrs: node.getMultiaddrs().map(String) })
const timed = async (work) => {
  const start = now()
  const more = await work()
  return { seconds: (now() - start) / 1000, ...more }
}

const operations = {
  info: async () => identity(),
  dial: async ({ addr }) => timed(async () => {
    await node.dial(multiaddr(addr), { signal: AbortSignal.timeout(10_000) })
  }),
  redial: async ({ addr, count }) => {
    const ms = []
    for (let n = 0; n < count; n++) {
      const start = now()
      const connection = await node.dial(multiaddr(addr), { force: true })
      ms.push(now() - start)
      await connection.close()
    }
    return { ms }
  },
  hang_up: async ({ key }) => { await node.hangUp(peerId(key)); return {} },
  peers: async () => ({ keys: node.getPeers().map(keyOf) }),
  connections: async () => ({
    connections: node.getConnections().map((one) => ({
      key: keyOf(one.remotePeer), addr: one.remoteAddr.toString(), limited: one.limits != null
    }))
  }),
  identify: async ({ key }) => {
    for (let tries = 0; tries < 500 && !identified.has(key); tries++) {
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    if (!identified.has(key)) throw new Error('the peer was not identified')
    return { key, ...identified.get(key) }
  },
  ping: ({ key }) => pingOver(key),
  subscribe: async ({ topic, report }) => {
    topics.set(topic, { count: 0, bytes: 0, latencies_ms: [], report: report ?? false })
    node.services.pubsub.subscribe(topic)
    return {}
  },
  subscribers: async ({ topic }) => ({ keys: node.services.pubsub.getSubscribers(topic).map(keyOf) }),
  publish: async ({ topic, data }) => {
    await node.services.pubsub.publish(topic, Uint8Array.from(Buffer.from(data, 'base64')))
    return {}
  },
  publish_many: publishMany,
  received: async ({ topic, clear }) => {
    const { count, bytes, latencies_ms: latencies } = topics.get(topic)
    if (clear) topics.set(topic, { ...topics.get(topic), count: 0, bytes: 0, latencies_ms: [] })
    return { count, bytes, latencies_ms: latencies }
  },
  send: async ({ key, ...options }) => timed(async () => {
    return { count: Number((await answerTo(key, SINK, options)).readBigUInt64BE()) }
  }),
  digest: async ({ key, ...options }) => ({ digest: hex(await answerTo(key, DIGEST, options)) }),
  echo: async ({ key, ...options }) => {
    const hash = createHash('sha256')
    await converse(key, ECHO, options, (data) => update(hash, data))
    return { digest: hash.digest('hex') }
  },
  fetch: async ({ key, size, chunk, digest, half_close: early = true }) => timed(async () => {
    const stream = await open(key, FLOOD)
    const hash = digest ? createHash('sha256') : null
    let count = 0
    const order = Buffer.concat([uint64(size), Buffer.alloc(4)])
    order.writeUInt32BE(chunk, 8)
    await write(stream, order)
    const all = receive(stream, (data) => {
      count += data.byteLength
      if (hash) update(hash, data)
    })
    await Promise.all([early && finish(stream), all])
    await finish(stream)
    return { count, digest: hash ? hash.digest('hex') : '' }
  }),
  request: async ({ key, count, size, half_close: early = true }) => {
    const ms = []
    const payload = Buffer.from(content(0, size))
    for (let n = 0; n < count; n++) {
      const start = now()
      await request(key, payload, early)
      ms.push(now() - start)
    }
    return { ms }
  },
  provoke_reset: async ({ key }) => {
    const stream = await open(key, RESET)
    stream.send(new Uint8Array(1000))
    await receive(stream, () => undefined).then(
      () => { throw new Error('the stream ended without a reset') },
      () => undefined
    )
    return {}
  },
  send_and_reset: async ({ key, size }) => {
    const stream = await open(key, ECHO)
    const echoed = new Promise((resolve) => stream.addEventListener('message', resolve))
    await write(stream, uint64(2 * size))
    await sendContent(stream, size, 65536)
    await echoed
    stream.abort(new Error('as asked'))
    return {}
  },
  cpu: async () => {
    const { user, system } = process.cpuUsage()
    return { seconds: (user + system) / 1e6, rss_bytes: process.memoryUsage.rss() }
  }
}

// A fault of the library in the background must not end the peer; whoever watches stderr sees it.
process.on('unhandledRejection', (error) => console.error('unhandled:', error))

say({ event: 'ready', ...identity() })

for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: name, ...options } = JSON.parse(line)
  const work = operations[name]
  if (work === undefined) say({ id, error: `no such operation: ${name}` })
  else work(options).then((result) => say({ id, result }), (error) => say({ id, error: String(error) }))
}
process.exit(0)
