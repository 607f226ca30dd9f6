//! A model of a network link: a proxy for TCP connections to one address that delays what passes and bounds its rate.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, tcp},
    runtime::Runtime,
    sync::mpsc,
    time::{sleep, sleep_until},
};

/// What is read at a time, in bytes.
const PIECE: usize = 32 << 10;
/// Pieces on their way in one direction of a connection: some 4 MiB, as a kernel's buffers.
const UNDER_WAY: usize = 128;

/// What timers are exact to.
const TICK: Duration = Duration::from_millis(1);
/// How late a piece may be given to the link and still pass as if it had come in time: timers fire late, and the proxy has to wait for
/// a core. Without it the link would be idle then, as no real one is. An idle link passes so much at once.
const LATE: Duration = Duration::from_millis(4);

/// How fast a link is.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Until an answer to a question arrives.
    pub round_trip: Duration,
    /// Towards the reader, all connections together.
    pub bytes_per_second: f64,
}

/// A link; it is there as long as this.
pub struct Link {
    pub addr: SocketAddr,
    _runtime: Runtime,
}

/// Until when the link is taken by what was given to it.
type Busy = Arc<Mutex<Instant>>;

impl Link {
    /// A link to `target`.
    pub fn open(target: SocketAddr, speed: Speed) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let busy: Busy = Arc::new(Mutex::new(Instant::now()));
        runtime.spawn(async move {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
                return;
            };
            while let Ok((near, _)) = listener.accept().await {
                let busy = Arc::clone(&busy);
                tokio::spawn(async move {
                    // The handshake.
                    sleep(speed.round_trip).await;
                    let Ok(far) = TcpStream::connect(target).await else {
                        return;
                    };
                    near.set_nodelay(true).ok();
                    far.set_nodelay(true).ok();
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::join!(
                        pass(near_in, far_out, speed, None),
                        pass(far_in, near_out, speed, Some(busy))
                    );
                });
            }
        });
        Ok(Self {
            addr,
            _runtime: runtime,
        })
    }
}

/// Waits, but not for less than timers can: pieces of a fast link are due more often.
async fn wait_until(due: Instant) {
    if due > Instant::now() + TICK {
        sleep_until(due.into()).await;
    }
}

/// Passes bytes on, each half a round trip later, and at the link's rate where `busy` is given.
async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, speed: Speed, busy: Option<Busy>) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let read = async move {
        let mut piece = vec![0; PIECE];
        while let Ok(len @ 1..) = from.read(&mut piece).await {
            let mut sent = Instant::now();
            if let Some(busy) = &busy {
                let mut until = busy.lock();
                let begun = until.max(sent.checked_sub(LATE).unwrap_or(sent));
                sent = begun + Duration::from_secs_f64(len as f64 / speed.bytes_per_second);
                *until = sent;
            }
            // The link takes no more before it has sent this.
            wait_until(sent).await;
            if sender
                .send((sent + speed.round_trip / 2, piece[..len].to_vec()))
                .await
                .is_err()
            {
                break;
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = receiver.recv().await {
            wait_until(due).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        to.shutdown().await.ok();
    };
    tokio::join!(read, write);
}
