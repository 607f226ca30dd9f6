//! Job that verifies the cache.

use std::{collections::HashSet, sync::Arc};

use super::{Event, Events};
use crate::{
    blob::bulk::BulkLimits,
    image::{reference::Reference, resolve::Images, verify::ImageVerifier},
};

pub(super) async fn run(references: &[String], repair: bool, images: &Images, bulk: &Arc<BulkLimits>, events: &Events) {
    let failed = |what: &str, why: String| Event::Failed {
        what: what.to_owned(),
        why,
    };
    let mut unmatched = HashSet::new();
    for text in references {
        match text.parse::<Reference>() {
            Ok(reference) => _ = unmatched.insert(reference),
            Err(error) => _ = events.send(failed(text, error.to_string())).await,
        }
    }
    let mut verifier = ImageVerifier::new(images, bulk, repair);
    let known = match verifier.recorded() {
        Ok(known) => known,
        Err(error) => {
            events.send(failed("the images", error.to_string())).await.ok();
            return;
        }
    };
    for path in known.damaged {
        let why = "damaged record of an image; seed the image again, or delete the file".to_owned();
        events.send(failed(&path.display().to_string(), why)).await.ok();
    }
    for (reference, images) in known.references {
        if !references.is_empty() && !unmatched.remove(&reference) {
            continue;
        }
        events.send(Event::Begin(reference.to_string())).await.ok();
        for (age, named) in images.into_iter().enumerate() {
            let verified = verifier.verify(&reference, named, age > 0).await;
            events.send(Event::Checked(verified)).await.ok();
        }
    }
    for reference in unmatched {
        let why = "no image of this name on this host".to_owned();
        events.send(failed(&reference.to_string(), why)).await.ok();
    }
    if references.is_empty() {
        events.send(Event::Unknown(verifier.unknown())).await.ok();
    }
}
