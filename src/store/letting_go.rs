//! Lets go of layers whose last use is gone: makes the kernel drop their names, so that it forgets their nodes and
//! their memory can be freed.
//!
//! This is a thread of its own. The kernel takes a directory's lock to drop a name in it, and holds that lock while it
//! waits for the answer to a request in the directory; so it must not be done while such a request is answered.

use std::{
    io,
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
    time::{Duration, Instant},
};

use super::names::LayerDir;
use crate::vfs::{NodeId, ROOT};

/// How long to wait for look-ups in a directory to end. They are bounded by a time-out of their own.
const PATIENCE: Duration = Duration::from_secs(600);

/// Makes the kernel drop a name that it remembers.
pub trait Forgetful: Send {
    /// Drops `name` in `parent` and what is below it, as far as it is not in use. May wait for requests to be served.
    fn drop_name(&self, parent: NodeId, name: &[u8]);
}

/// The thread that lets go; it ends with this.
pub struct LettingGo(mpsc::Sender<Arc<LayerDir>>);

impl LettingGo {
    /// Starts the thread.
    pub fn start(forgetful: Box<dyn Forgetful>) -> io::Result<Self> {
        let (sender, layers) = mpsc::channel::<Arc<LayerDir>>();
        let work = move || {
            for layer in layers {
                let_go(&*forgetful, &layer);
            }
        };
        thread::Builder::new().name("let-go".to_owned()).spawn(work)?;
        Ok(Self(sender))
    }

    /// Lets go of a layer, some time soon.
    pub fn let_go(&self, layer: Arc<LayerDir>) {
        // The thread ends only with this.
        self.0.send(layer).ok();
    }
}

fn let_go(forgetful: &dyn Forgetful, layer: &LayerDir) {
    tracing::info!(image = %layer.parent.reference, layer = %layer.digest, "layer is no longer used");
    for name in [&b"diff"[..], b"info", b"blob"] {
        forgetful.drop_name(layer.node, name);
    }
    // A look-up in the directory may wait for a registry, and dropping a name would wait with it, in the kernel, where
    // not even SIGKILL would end this process.
    let start = Instant::now();
    while layer.parent.resolving.load(Ordering::Acquire) > 0 && start.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(50));
    }
    forgetful.drop_name(layer.parent.node, layer.digest.to_string().as_bytes());
    forgetful.drop_name(ROOT, &layer.parent.name);
}
