//! Checks the cache.

use std::{collections::HashSet, sync::Arc};

use super::{Event, Events};
use crate::{
    blob::verify::Bulk,
    image::{reference::Reference, resolve::Images, verify::ImageVerifier},
};

pub(super) async fn run(references: &[String], repair: bool, images: &Images, bulk: &Arc<Bulk>, events: &Events) {
    let failed = |what: &str, why: String| Event::Failed {
        what: what.to_owned(),
        why,
    };
    let mut wanted = HashSet::new();
    for text in references {
        match text.parse::<Reference>() {
            Ok(reference) => _ = wanted.insert(reference),
            Err(error) => _ = events.send(failed(text, error.to_string())).await,
        }
    }
    let mut checker = ImageVerifier::new(images, bulk, repair);
    let known = match checker.recorded() {
        Ok(known) => known,
        Err(error) => {
            events.send(failed("the images", error.to_string())).await.ok();
            return;
        }
    };
    for path in known.damaged {
        let why = "it is damaged, so that its image is not known; seed the image again, or delete the file".to_owned();
        events.send(failed(&path.display().to_string(), why)).await.ok();
    }
    for (reference, images) in known.references {
        if !references.is_empty() && !wanted.remove(&reference) {
            continue;
        }
        events.send(Event::Begin(reference.to_string())).await.ok();
        for (age, named) in images.into_iter().enumerate() {
            let checked = checker.verify(&reference, named, age > 0).await;
            events.send(Event::VerifiedImage(checked)).await.ok();
        }
    }
    for reference in wanted {
        let why = "no image of that name is known on this host".to_owned();
        events.send(failed(&reference.to_string(), why)).await.ok();
    }
    if references.is_empty() {
        match checker.unknown() {
            Ok(unknown) => _ = events.send(Event::UnknownBlobs(unknown)).await,
            Err(error) => _ = events.send(failed("the cache", error.to_string())).await,
        }
    }
}
